"""Which layers to thin, chosen without data (ours): kept widths for a budget of parameters and MACs."""
