"""The tables and figures of Reiners, Klamroth and Stiglmayr, 2020, rerun."""
