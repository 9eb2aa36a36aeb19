"""The claims of the papers, figure by figure, with their thresholds, decided on results."""
