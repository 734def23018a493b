"""How each kind of server is started: settings in, a plan out. Starts nothing, writes nothing."""
