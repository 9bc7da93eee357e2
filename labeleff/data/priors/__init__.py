"""Priors: what is known of the sizes of organs before anybody has labelled a case. One file per source of knowledge."""
