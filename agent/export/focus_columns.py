"""The columns of a FOCUS cost and usage dataset as kvtally fills it, in the specification's order, custom ones last."""

from __future__ import annotations

from kvtally.agent.export.rows import Column

FOCUS_VERSION = "1.2"

# Columns of FOCUS 1.2 that are not here have nothing to say: commitment discounts and capacity reservations are the
# operator's with a cloud, in whose own dataset they stand; prices are in one currency; the type of an account is one
FOCUS = (
    Column("BilledCost", "money"),
    Column("BillingAccountId", "text"),
    Column("BillingAccountName", "text"),
    Column("BillingCurrency", "text"),
    Column("BillingPeriodEnd", "instant"),
    Column("BillingPeriodStart", "instant"),
    Column("ChargeCategory", "text"),
    Column("ChargeClass", "text"),
    Column("ChargeDescription", "text"),
    Column("ChargeFrequency", "text"),
    Column("ChargePeriodEnd", "instant"),
    Column("ChargePeriodStart", "instant"),
    Column("ConsumedQuantity", "number"),
    Column("ConsumedUnit", "text"),
    Column("ContractedCost", "money"),
    Column("ContractedUnitPrice", "money"),
    Column("EffectiveCost", "money"),
    Column("InvoiceId", "text"),
    Column("InvoiceIssuerName", "text"),
    Column("ListCost", "money"),
    Column("ListUnitPrice", "money"),
    Column("PricingCategory", "text"),
    Column("PricingQuantity", "number"),
    Column("PricingUnit", "text"),
    Column("ProviderName", "text"),
    Column("PublisherName", "text"),
    Column("RegionId", "text"),
    Column("RegionName", "text"),
    Column("ResourceId", "text"),
    Column("ResourceName", "text"),
    Column("ResourceType", "text"),
    Column("ServiceCategory", "text"),
    Column("ServiceName", "text"),
    Column("ServiceSubcategory", "text"),
    Column("SkuId", "text"),
    Column("SkuMeter", "text"),
    Column("SkuPriceDetails", "text"),
    Column("SkuPriceId", "text"),
    Column("SubAccountId", "text"),
    Column("SubAccountName", "text"),
    Column("Tags", "text"),
)
_OF_THE_CHARGE = (
    Column("x_Resource", "text"),
    Column("x_State", "text"),
    Column("x_Term", "text"),
    Column("x_PriceBasis", "text"),
    Column("x_Model", "text"),
    Column("x_IsSettled", "flag"),
    Column("x_Revision", "count"),
)
# of all that a replica did in the hour: on one row of it, so that sums are right
TOKENS = (
    Column("x_PromptTokens", "count"),
    Column("x_ComputedTokens", "count"),
    Column("x_CachedTokensHBM", "count"),
    Column("x_CachedTokensDRAM", "count"),
    Column("x_CachedTokensDisk", "count"),
    Column("x_CachedTokensP2P", "count"),
    Column("x_CachedTokensExternal", "count"),
    Column("x_GeneratedTokens", "count"),
)
SAVINGS = (
    *(
        Column(f"x_{measure}{bound}", "money")
        for measure in ("AvoidedCost", "NetSavings", "RealisedSavings")
        for bound in ("", "Low", "High")
    ),
    Column("x_SavingsStatus", "text"),
)
COLUMNS = (*FOCUS, *_OF_THE_CHARGE, *TOKENS, *SAVINGS)
