"""For the process that workers are forked from, before all else: imports make some 500,000 objects
that stay, and the garbage collector would look through them again and again, for seconds. A forked
worker freezes them and switches it on (`cluster.live`). Nothing else imports this."""

import gc

gc.disable()
