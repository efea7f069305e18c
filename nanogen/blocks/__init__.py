"""The parts that every chapter shares. They know neither images nor sound, and import nothing of nanogen."""
