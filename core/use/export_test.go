package use

import "golang.org/x/crypto/bcrypt"

func init() {
	if lockCost < 12 {
		panic("a hash of the state file could be guessed")
	}
	lockCost = bcrypt.MinCost
}
