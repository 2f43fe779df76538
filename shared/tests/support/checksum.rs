//! The checksum in which golden pixels travel.

/// CRC-32 as zlib and PNG have it, in hexadecimal digits.
pub fn crc32(bytes: impl IntoIterator<Item = u8>) -> String {
    static TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let (mut crc, mut bit) = (byte as u32, 0);
            while bit < 8 {
                crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
                bit += 1;
            }
            table[byte] = crc;
            byte += 1;
        }
        table
    };
    let crc = !bytes.into_iter().fold(!0u32, |crc, byte| (crc >> 8) ^ TABLE[usize::from(crc as u8 ^ byte)]);
    format!("{crc:08x}")
}
