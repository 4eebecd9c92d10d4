"""Exported detectors in the runtimes of other programs, one module per runtime; PyTorch is imported by its own alone."""
