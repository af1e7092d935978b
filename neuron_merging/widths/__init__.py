"""The choice of widths without data (ours): how many neurons each layer keeps, for a budget of parameters and MACs."""
