"""Progressive Neural Networks (Rusu et al. 2016, arXiv 1606.04671) for Ray RLlib."""
