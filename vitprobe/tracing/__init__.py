"""What a forward pass does, and how it is watched: layers, additions, attention, token places.

Everything here follows from operations observed in passes of small examples. It knows neither
images on disk nor runs over many batches (``running``), nor results.
"""
