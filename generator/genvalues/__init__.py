"""genvalues: from a checked inputs file to the values the chart accepts."""

__version__ = "0.1.0"
