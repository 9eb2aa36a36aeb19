"""Pure functions of tensors: HSIC and CKA, moments, jackknife and bootstrap, ridge.

No model, image, run or result is known here; each function stands on its own definition.
"""
