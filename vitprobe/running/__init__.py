"""Models and images through the forward passes: devices, batches, progress, resume, processes.

Nothing here knows what is measured, beyond named float64 sums. What a pass does inside a model
belongs in ``tracing``; formulas belong in ``statistics``.
"""
