"""A user study, as the paper's Table 2: people rank the edits of up to five methods without knowing whose they are."""
