"""What the forward model costs, and which of the claims made for KV caches hold (METHOD 8).

cost       prices of GPUs and of what holds the KV; cost of tokens; reuses that pay for holding
claims     an article's claims, each with its figure and the condition under which it turns
"""
