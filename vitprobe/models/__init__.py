"""From what a user writes to a ready model: names, timm, the hub, files, modules.

A ``Model`` has its module, transform, input size and provenance. What happens inside a module is
for ``tracing``.
"""
