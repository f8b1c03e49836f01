"""The ranks of a job: launcher, rendezvous, stop signals, and an emulated cluster on one GPU."""
