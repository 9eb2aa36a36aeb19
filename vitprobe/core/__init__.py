"""The ground floor: what every measurement stands on."""
