"""The ranks of a job: where they find each other and how they leave together."""
