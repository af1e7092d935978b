"""What of a network can be dropped, read off its graph, and the network run node by node."""
