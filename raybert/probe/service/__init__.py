"""The probe service: a detached actor with a queue in storage, and the client that feeds it."""
