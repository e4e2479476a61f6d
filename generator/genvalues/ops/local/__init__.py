"""Run the chart's stages on this computer, as processes, with the same config and environment as in a cluster."""
