"""What a person sees: tables of the same values that JSON carries. The only package that loads rich."""
