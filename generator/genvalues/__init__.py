"""genvalues: from a checked inputs file to the values the chart accepts."""
