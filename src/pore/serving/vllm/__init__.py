"""vLLM as the server: rankers and a client for its stock form, and a plug-in for the rest."""
