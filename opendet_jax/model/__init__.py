"""The network, one file for each part of the paper's Figure 2; opendet.py joins them."""
