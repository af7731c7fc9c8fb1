"""What many subjects take: a simulation fed by a measured run."""
