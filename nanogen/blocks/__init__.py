"""The parts that methods share. They know neither images nor sound, and import only one another."""
