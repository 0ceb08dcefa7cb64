// dpumesh.h: the C interface of dpumesh backends, version 1.0. Made from dpumesh-hw/src/loader/abi.rs; do not edit.
//
// A backend is a shared library with one symbol, `dpumesh_backend_v1`, which gives a table of functions (`dm_ops`). What each
// function must do is told at the trait of the same name in dpumesh-core; what is said here is how it is said in C.
//
//  * Every struct begins with its size, but for those marked frozen. Later minor versions only append: whoever gets a
//    struct looks at no more than its size, and whoever makes one sets it (`DM_NEW`).
//  * All memory is the caller's and stays valid until the call ended. Texts and lists of an answer are taken from the
//    call's arena (`dm_take`, `dm_text`); elements of an answer go to its rows (`DM_ROW`). If either has no room, a call that changes
//    nothing answers DM_MORE and is made again with more.
//  * Enumerations are numbers. One that is not known must be refused, never guessed.
//  * Nothing is unwound, thrown or jumped across.
//  * A control call must not block. One that takes time answers DM_PENDING; its end is fetched by `poll`, when the
//    descriptor of `poll_fd` is readable. So are events, by `next_event`.
//
// For 64-bit machines. examples/c-backend has a whole backend.
