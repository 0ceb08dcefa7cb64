//! Yusur DPUs: the SR-IOV floor and the network processor behind the vendor's library.
