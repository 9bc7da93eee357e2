"""How labels change between passes over the data. See :class:`labeleff.annotators.base.Annotator`."""
