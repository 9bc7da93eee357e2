"""Label noise: how annotators go wrong, as seeded functions of a label map in physical units. One registered model each."""
