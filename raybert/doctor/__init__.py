"""`raybert doctor`: is this cluster fit for the run, before it costs money?"""
