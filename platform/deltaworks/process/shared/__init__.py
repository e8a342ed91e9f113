"""Apps that several processes run, each its shares of the entities.

sharing         one member's part: shares are given, left and lost
shares          which entities are a member's to process, in its state
member          how a member stands, as it says to the group
members         every member of an app, for whoever looks
member_letters  dead letters over all members, and who is to be asked to see to one
"""
