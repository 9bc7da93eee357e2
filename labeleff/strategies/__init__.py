"""How a network learns from a batch: one file per method. See :class:`labeleff.strategies.base.Strategy`."""
