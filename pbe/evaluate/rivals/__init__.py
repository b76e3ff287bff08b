"""Other people's models on the same bench: the paper's comparisons (Table 1), and newer ones. One file per kind."""
