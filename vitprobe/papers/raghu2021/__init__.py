"""Raghu et al. 2021 (arXiv 2108.08810), Do Vision Transformers See Like CNNs?, by subject.

``alike`` and ``same_depth``: Figures 1, 2 and 12; ``attention``: 3 and 5; ``fields``: 6;
``skips``: 7 and 8; ``tokens``: 9, 10, 11 and 13. Where the paper says "clearly" or "about", the
threshold is ours and stands at the head of its file.
"""
