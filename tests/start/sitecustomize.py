"""What every Python process of the tests begins with (Python imports this name by itself).

A process of Ray imports 300,000 objects, hardly any of which is garbage, and Python looks for some again and again:
a second of the four that such a start takes. The tests start hundreds of processes.
"""

import gc

gc.set_threshold(100_000, 50, 1_000)
