"""What a measurement leaves: numbers with provenance, findings, tables, figures, files.

Nothing here runs a model. Claims of papers and their thresholds belong in ``papers``.
"""
