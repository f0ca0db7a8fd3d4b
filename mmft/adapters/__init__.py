"""Plan, attach, freeze and save what is trained."""
