"""The constrained decision process of OGS: environment, simulator, policies; neither models nor training live here."""
