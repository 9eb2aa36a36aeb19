"""What the report says beside each figure: what it shows, how to read it, what a cell holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """The words of one kind of figure.

    Attributes:
        title: of the section.
        shows: what is drawn, and the papers' figures.
        read: how to read it.
        value: what a heat map's cell holds; empty where there is no heat map to point at.
        places: whether rows and columns of the heat maps mean something by themselves.
        logarithms: whether the heat maps are drawn from logarithms (to base 10) of the value.
    """

    title: str
    shows: str
    read: str
    value: str = ""
    places: bool = True
    logarithms: bool = False


TEXTS = {
    "cka": Text(
        "CKA between all layers",
        "How alike any two layers arrange the images (linear CKA, unbiased, summed over "
        "minibatches); Raghu et al., Figures 1 and 2.",
        "Both axes go from input (lower left) to output. 1: equal up to rotation and scale; 0 is "
        "expected of independent representations. A light square along the diagonal is a stage of "
        "layers that do much the same; a map that is light all over has no stages. Hatched: "
        "undefined, the layer does not vary over the images.",
        "CKA",
    ),
    "attention_distance": Text(
        "Mean attention distance",
        "How far each head looks, in input pixels, averaged over images and queries; Raghu et al., "
        "Figures 3 and 4; Dosovitskiy et al., Figures 7 right and 11.",
        "A head near 0 looks at its own neighbourhood, one near the dashed line spreads its "
        "attention evenly over the picture. Left: the heads of the lowest and highest layers in "
        "order of distance; right: all heads against depth.",
    ),
    "head_subsets": Text(
        "Heads of the first block and a CNN's lowest layers",
        "CKA of subsets of the first block's heads, sorted by attention distance, with the CNN's "
        "lowest layers; Raghu et al., Figure 5.",
        "A line that falls says that local heads compute what the convolutions do and global heads "
        "do not. ρ is Spearman's correlation of the two axes.",
    ),
    "attention_rollout": Text(
        "Attention rollout",
        "Attention multiplied through all layers, from the class token (or the mean of all tokens) "
        "back to the patches; Dosovitskiy et al., Figures 6 and 14.",
        "Light patches reach the output most. Each map is scaled to its own range, so maps can be "
        "compared in shape and not in strength.",
        "share of the attention",
    ),
    "receptive_field": Text(
        "Effective receptive fields",
        "The mean absolute gradient of each layer's centre with respect to the input pixels; Raghu "
        "et al., Figures 6 and C.1 to C.4.",
        "From left to right through the layers; linear above, logarithmic below, each panel over "
        "its maximum. The lines give the share of the picture that holds 50 % and 90 % of the "
        "gradient: a line that starts high sees far from the first layer on.",
        "gradient, share of the panel's maximum (its log₁₀ in logarithmic rows)",
    ),
    "skip_ratio": Text(
        "What skips carry and branches add",
        "The norm of what the skip carries over the norm of what the branch adds, and the cosine "
        "between the two, at every residual addition; Raghu et al., Figures 7, E.1 and E.2.",
        "A ratio above 1 says that the representation passes a block mostly through the skip. "
        "Hatched, or without a line: the branch is exactly 0.",
        "‖z‖ / ‖f(z)‖",
        logarithms=True,
    ),
    "skip_ablation": Text(
        "Without the skips of one block",
        "CKA between all layers with the skips of one block taken away at test time. Raghu et al., "
        "Figure 8, train such networks; this is another experiment on the trained network.",
        "Dark off-diagonal corners say that layers before and after the block are no longer alike. "
        "The first panel of a row has all skips; blue lines bound the block.",
        "CKA",
    ),
    "linear_probe": Text(
        "Few-shot linear probes",
        "The accuracy of linear classifiers on a few images a class, at every block and for every "
        "way of reading it out; Raghu et al., Figures 11 and 13.",
        "Where a line rises, the class becomes readable there. Below: the accuracy of each single "
        "token of the last block.",
        "accuracy",
    ),
    "localization": Text(
        "Do tokens keep their place?",
        "CKA between single tokens of the last block and every patch of the input; Raghu et al., "
        "Figures 9 and 10.",
        "A token that is still about its own patch (in the square) peaks there; a flat map belongs "
        "to a token that holds the whole picture. Every row has its own scale.",
        "CKA",
    ),
    "position_embedding": Text(
        "Position embeddings",
        "The cosine similarity of every patch's position embedding with every other's, a small map "
        "a patch, and relative-position biases; Dosovitskiy et al., Figure 7 centre.",
        "A bright spot at the patch's own place says that neighbours are alike, a bright cross "
        "that rows and columns are.",
        "similarity, or bias minus its mean",
        places=False,
    ),
    "patch_embedding": Text(
        "First filters",
        "The leading principal components of the patch-embedding filters, or of the CNN's first "
        "layer; Dosovitskiy et al., Figure 7 left.",
        "Trained filters have smooth, low-frequency and colour-opponent components first; those of "
        "an untrained network look like noise. Each tile is scaled to its own range.",
    ),
    "token_norms": Text(
        "Norms of tokens",
        "The norms of all patches at every block's output (grey: how many there are), of the "
        "class token and of registers; Darcet et al., Figures 3 to 7.",
        "Patches above the dashed line stand out: in large or long-trained ViTs some take over "
        "what registers are for. Right: the norms of the last layer over a few images.",
        "‖x‖",
    ),
}
