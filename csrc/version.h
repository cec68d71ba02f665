// The version of fastpo that a library is of, in words that are found in its file without loading it.
#pragma once

#define FASTPO_TEXT_(x) #x
#define FASTPO_TEXT(x) FASTPO_TEXT_(x)
#define FASTPO_SAYS_VERSION "fastpo version " FASTPO_TEXT(FASTPO_VERSION)
