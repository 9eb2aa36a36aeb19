"""The one table of what no general rule tells, with its reason."""

# Attention modules by class name, and why their maps are not the attention that the papers mean.
NO_PROBABILITIES = {
    "DiffAttention": "its attention is the difference of two maps, with negative weights",
    "OutlookAttention": "its weights are foretold from the middle, not found by comparing places",
    "TalkingHeadAttn": "its heads mix their maps after the softmax, with negative weights",
}

# Python modules whose sums have no skip, unless an operand goes into the other as it is.
SUMS_OF_OPERATIONS = dict.fromkeys(
    ("timm.models.nasnet", "timm.models.pnasnet"),
    "a searched cell sums the results of operations, pooling among them, in pairs",
)
