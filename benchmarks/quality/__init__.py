"""How good recommendations are: what a pruned recommender is compared with, on the same splits."""
