"""Many runs: methods, label budgets, draws and seeds on equal terms, on one machine or a cluster."""
