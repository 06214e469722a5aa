//! Objective: demonstrations as responses whose reward is 1 (UFT)
