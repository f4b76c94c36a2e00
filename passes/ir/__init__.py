"""The intermediate representation: Program, lattice, keep sets, sweeps, rewriting."""
