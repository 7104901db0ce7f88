"""The client: a recipe and a strategy's half make a ClientApp."""

from __future__ import annotations

from clients.flower_app import client_app
from digits_app.task import SEED, examples, model, recipe, strategy

app = client_app(recipe, model, examples, hooks=strategy, seed=SEED)
