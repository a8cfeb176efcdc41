"""What a run does when something fails: restarts, resizes, preemption, hangs, repairs."""
