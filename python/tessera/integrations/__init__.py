"""Tessera inside other frameworks: ``tessera.integrations.transformers``, ``tessera.integrations.lightning``. Each
module loads its framework when it is used, not before."""
